"""Published methods over torch tensors, for comparison at the same token budget.

All layers have the budget, also those that ArkVale (the first two), MagicPIG (two in 32) and OmniKV
(its filters) keep whole; each docstring says what else differs from the paper.

tensor_session   what they share: tokens, exact attention over what was selected, mass, bytes
budget           how a token budget is spent: sink, window, the best of the rest
observed         attention of the prompt's last queries, which eviction goes by
layer_reuse      the IceCache paper's index, searched in some layers for those that follow
h2o, snapkv      evict: what is gone cannot be attended to later
arkvale          pages by a bounding volume of their keys
omnikv           tokens of a few layers, shared by those that follow
pqcache          tokens by product-quantised keys
magicpig         tokens sampled by locality-sensitive hashing
retroinfer       clusters, the rest estimated from centroids
"""
