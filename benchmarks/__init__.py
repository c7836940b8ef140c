"""What a train step over adapters costs, in jlora and elsewhere: `python -m benchmarks`."""
