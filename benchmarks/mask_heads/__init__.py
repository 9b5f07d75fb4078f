"""Compare mask branches on one frozen trunk."""
