"""The worker's loop, the engines that carry its arithmetic, the teacher, the checkpoints."""
