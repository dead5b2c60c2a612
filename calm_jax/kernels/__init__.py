"""Operations with platform-specific implementations: one file per operation, plain one first."""
