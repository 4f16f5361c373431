"""Recurrent latent memory: a constant-size state carried from segment to segment."""
