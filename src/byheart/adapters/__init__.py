"""byheart's memories on Hugging Face models."""
