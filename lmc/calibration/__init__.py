"""What blending costs a model in quality: measured once, asked at every request."""
