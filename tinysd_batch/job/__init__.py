"""From a manifest to a folder of pictures and a table of what happened. Knows no torch.

manifest -> plan -> driver -> pool -> worker -> results
"""
