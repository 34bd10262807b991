"""Caption metrics, equal to the MS-COCO toolkit's, and how sure they are."""
