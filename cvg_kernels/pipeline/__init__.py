"""What touches a diffusers pipeline: one set of hooks, which decode every denoiser call once."""
