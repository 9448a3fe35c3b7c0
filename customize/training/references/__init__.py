"""Training of reference encoders and adapters in three stages (EasyRef, arXiv 2412.09618)."""
