//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package exportd

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// noFollow refuses a symbolic link that somebody put where the temporary file goes.
const noFollow = syscall.O_NOFOLLOW

// lock keeps other downloads out until the file is closed, or the process ends.
func lock(file *os.File) error {
	err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("another download is writing %s; wait for it, or give another path", file.Name())
	}
	if err != nil {
		return &os.PathError{Op: "lock", Path: file.Name(), Err: err}
	}
	return nil
}

// removeUnheld removes a temporary file that no download is writing.
func removeUnheld(path string) {
	file, err := os.OpenFile(path, os.O_RDWR|noFollow, 0)
	if err != nil {
		return
	}
	defer file.Close()
	if lock(file) == nil {
		_ = os.Remove(path)
	}
}

// closeToRename does nothing here: open files are renamed, too, and stay locked.
func closeToRename(*os.File) error { return nil }

// syncDirectory makes a rename durable.
func syncDirectory(path string) error {
	directory, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(directory.Sync(), directory.Close())
}
