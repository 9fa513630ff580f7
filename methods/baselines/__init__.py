"""What Brain-IT is compared with: predictors of image features that know less of the brain than it does.

``ridge`` is linear and knows one subject; ``mlp`` shares a network between subjects that each have a linear map of
their own.
"""
