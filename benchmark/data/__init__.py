"""The data: NSD in its own files, and the miniature NSD that stands in for it.

``nsd`` reads both; ``simulate`` writes the miniature; ``brain`` is the simulated brain behind it; ``scenes`` draws its
pictures; ``splits`` divides what was seen into training, validation and test images.
"""
