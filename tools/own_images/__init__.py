"""Pre-train and fine-tune on one's own images: recipes whose values are derived from the images at hand."""
