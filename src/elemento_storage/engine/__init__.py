"""Block work on images: reading headers, qemu-img."""
