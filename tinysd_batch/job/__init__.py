"""From a manifest to a folder of images and a table of results. Imports no torch.

manifest -> plan -> driver -> pool -> worker -> results
"""
