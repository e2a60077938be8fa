"""What ours is held against: other ways to compute the same, and what each must give at which sizes."""
