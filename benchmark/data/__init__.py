"""The data: NSD in its own files, the miniature NSD that stands in for it, and what else the paper uses.

Reading a tree: ``nsd``, ``algonauts``, ``synthetic``, ``external`` on what ``tree`` and ``formats`` share; ``sources``
picks one. ``splits`` divides what was seen into training, validation and test images. ``inspection`` says what a tree
has and lacks, by ``look``, ``release`` (published numbers) and ``supplies`` (where to get it). ``prepare`` turns a tree
into a store of memory-mapped arrays by ``recipes`` and ``arrays``; ``prepared`` reads it.

Making one: ``simulate`` writes a miniature, ``companions`` what can lie beside it; ``brain`` is the simulated brain
behind it; ``scenes`` draws its pictures.
"""
