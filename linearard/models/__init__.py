"""The student, its teacher, and the RoPE that tells them apart."""
