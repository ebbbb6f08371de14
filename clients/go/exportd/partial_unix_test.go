//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package exportd

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAFileStaysLockedUntilItHasItsName(t *testing.T) {
	final := filepath.Join(t.TempDir(), "positions.csv")
	partial, err := openPartial(final, partialKey{jobID: jobID, generation: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer partial.close()
	if err := partial.publish(final, false); err != nil {
		t.Fatal(err)
	}
	named, err := os.Open(final)
	if err != nil {
		t.Fatal(err)
	}
	defer named.Close()
	if lock(named) == nil {
		t.Error("the lock was given up before the name was")
	}
}

func TestALeftoverThatADownloadIsWritingStays(t *testing.T) {
	final := filepath.Join(t.TempDir(), "positions.csv")
	partial, err := openPartial(final, partialKey{jobID: jobID, generation: 1})
	if err != nil {
		t.Fatal(err)
	}
	newer := partialKey{jobID: jobID, generation: 2}
	removeLeftovers(final, newer)
	if _, err := os.Lstat(partial.path); err != nil {
		t.Error(err)
	}
	partial.close()
	removeLeftovers(final, newer)
	if _, err := os.Lstat(partial.path); !os.IsNotExist(err) {
		t.Error("it stays when nobody writes it, too")
	}
}
