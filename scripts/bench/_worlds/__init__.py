"""The parts of benchmarks of the sticker world."""
