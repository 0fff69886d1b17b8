"""The processes of one model beside MLX's sums: how they meet, what they tell each other, who is
still there."""
