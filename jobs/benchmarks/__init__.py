"""How near the software is to its floor: ratios within one run; absolute figures belong to the machine."""
