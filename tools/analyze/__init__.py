"""What trained networks look like inside: `fcmae analyze`. One file per analysis; each gives numbers and draws them."""
