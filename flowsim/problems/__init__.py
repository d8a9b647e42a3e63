"""What is descended: nets on data with a loss, quadratics, and the kinks of both."""
