"""Expert review: clinicians' blinded preferences between two models' answers, and what they say together."""
