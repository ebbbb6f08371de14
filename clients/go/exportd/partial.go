package exportd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// partialFile is the temporary file of a download, held by one process at a time. Its name
// says what it holds, and its bytes are in order from the first on, so that it can be gone
// on with after the process was killed.
type partialFile struct {
	file *os.File
	path string
}

// openPartial opens the temporary file beside final, or makes it.
func openPartial(final, key string) (*partialFile, error) {
	path := filepath.Join(filepath.Dir(final), fmt.Sprintf(".%s.%s.part", filepath.Base(final), key))
	for {
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|noFollow, 0o666)
		if err != nil {
			return nil, err
		}
		if err := lock(file); err != nil {
			return nil, errors.Join(err, file.Close())
		}
		// Whoever held the lock may have renamed the file away meanwhile.
		held, err := file.Stat()
		if err == nil {
			var named fs.FileInfo
			if named, err = os.Lstat(path); err == nil && os.SameFile(held, named) {
				return &partialFile{file, path}, nil
			}
		}
		if closed := file.Close(); closed != nil || (err != nil && !errors.Is(err, fs.ErrNotExist)) {
			return nil, errors.Join(err, closed)
		}
	}
}

func (p *partialFile) close() { _ = p.file.Close() } // what counts was synced

func (p *partialFile) remove() { _ = os.Remove(p.path) } // the download's error matters more

// publish gives the file its name, durably.
func (p *partialFile) publish(final string, overwrite bool) error {
	if err := p.file.Sync(); err != nil {
		return err
	}
	if err := p.file.Close(); err != nil { // not every system renames open files
		return err
	}
	rename := renameAnew
	if overwrite {
		rename = os.Rename
	}
	if err := rename(p.path, final); err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(final))
}

// renameAnew replaces nothing: a hard link fails when the name is taken.
func renameAnew(from, to string) error {
	err := os.Link(from, to)
	if err == nil {
		return os.Remove(from)
	}
	if refused := refuseExisting(to); refused != nil {
		return refused
	}
	return os.Rename(from, to) // a file system without hard links
}

// refuseExisting fails when the name is taken, be it by a dangling link.
func refuseExisting(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s: %w; give another path, or use WithOverwrite", path, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
