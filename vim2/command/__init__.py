"""What the command lines of `vim2.classify` and `vim2.forecast` share, which never import one another."""
