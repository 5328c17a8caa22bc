"""Text to latents to image, on one device. Independent of manifests, jobs, Ray and output folders.

Letters in shape comments: B images, 2B with guidance, C channels, h = height / 8 and w = width / 8 (of the latents),
T tokens, D text width, O output and K input features of a weight as a matrix, G groups of a row.
"""
