"""What runs inside the sandbox, beside the student's code. It holds no seed, no answer and no check."""
