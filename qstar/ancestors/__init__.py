"""What Quiet-STaR comes from and is compared with: STaR, and training with pause tokens."""
