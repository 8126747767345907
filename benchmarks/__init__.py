"""What gpuroi's figures are made of: `cases` is the work, `run` the clock, `report` the tables."""
