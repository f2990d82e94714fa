"""Kit of the report pages: text formats, charts, templates. Each page is defined in the package of its subject."""
