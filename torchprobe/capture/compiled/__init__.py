"""What `torch.compile` needs: the graphs that there are, their guards, what is traced into them, and retracing."""
