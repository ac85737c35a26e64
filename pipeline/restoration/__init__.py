"""From any video to the restored one, chunk by chunk, resumable.

May import data and what lies below it; never training."""
