"""Operations with forms tuned to a platform, one operation a file, its plain form first."""
