//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package exportd

import "os"

const noFollow = 0

// lock does nothing here: two downloads of the same job to the same path at once may spoil
// each other's bytes, which the checksums bring to light.
func lock(*os.File) error { return nil }

// removeUnheld removes a temporary file. Windows refuses that while it is open.
func removeUnheld(path string) { _ = os.Remove(path) }

// closeToRename closes the file: Windows renames no open ones.
func closeToRename(file *os.File) error { return file.Close() }

// syncDirectory does nothing here: directories cannot be synced.
func syncDirectory(string) error { return nil }
