"""One file per downstream job. A public function is named after the event type it takes; helpers start with `_`."""
