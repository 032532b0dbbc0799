"""Attention and SwiGLU, one public function each."""
