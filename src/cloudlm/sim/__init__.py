"""A fleet in virtual time: replays traffic and faults through the planes' own deciders."""
