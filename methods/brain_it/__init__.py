"""Brain-IT (arXiv 2510.25976): from fMRI to images with a Brain-Interaction Transformer.

Read in the order of the data: ``encoder`` -> ``clustering`` -> ``tokenizer`` -> ``transformer`` -> ``losses``.
"""
