"""Quality of a restored video: PSNR, SSIM, NIQE, warping error, Frechet distances, learned metrics.

May import weights and what lies below it.
"""
