"""Text to latents to image, on one device. Knows no manifest, no job, no Ray, no output folder.

Letters in shape comments: B images, 2B with guidance, C channels, h = height / 8 and w = width / 8 (of the latents),
T tokens, D text width, O out and K in features of a weight seen as a matrix, G groups of a row.
"""
