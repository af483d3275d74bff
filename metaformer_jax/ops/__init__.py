"""Operations on arrays that dense tasks share; no parameters."""
