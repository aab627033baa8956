"""What is evaluated and what is counted: coded systems from files, compressed experts, scores, example images."""
