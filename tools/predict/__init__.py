"""`fcmae predict` and `fcmae embed`: what a trained model says of images; `import fcmae` uses the same model."""
