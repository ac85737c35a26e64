"""Synthesis of low-quality video: blur, resizing, noise, JPEG and video codecs, drawn and applied apart.

    from degradations.recipe import REALBASICVSR, apply, draw
    degradation = draw(REALBASICVSR, seed=1, shape=frames.shape[:3], fps=24.0)
    result = apply(degradation, frames)  # result.lq, result.hq: uint8 (T, H, W, 3)

`operations/` has one file per degradation, `config.OrderConfig` is the table of them.
Imports nothing else of the project: it knows nothing of Ray, files or Parquet.
"""
