"""From finished stages to what people read: a sweep's rows (``rows``), and all sweeps on one page (``answers``)."""
