"""How good a restored video is: PSNR, SSIM, NIQE, warping error, Frechet distances, metrics by networks.

May import weights and what lies below it."""
