"""What every architecture's processor shares. Numpy and Pillow only: no MLX, no torch."""
