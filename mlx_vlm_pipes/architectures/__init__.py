"""One room per architecture; `mlx_vlm_pipes.registry` knows the list."""
