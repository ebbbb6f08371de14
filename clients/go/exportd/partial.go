package exportd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// partialFile is the temporary file of a download, held by one process at a time. Its name
// says what it holds, and its bytes are in order from the first on, so that it can be gone
// on with after the process was killed.
type partialFile struct {
	file *os.File
	path string
}

// maxPartialName is the longest name of a temporary file, in bytes: less than the 255 that
// file systems take.
const maxPartialName = 254

// partialKey says what bytes a temporary file holds.
type partialKey struct {
	jobID      string
	generation int64
	part       *int32 // nil: all parts, joined
}

// name is that of the temporary file for a target, in two pieces: the generation stands
// between them. A long target is shortened as if the numbers were the longest, so that the
// pieces are the same for each generation.
func (k partialKey) name(final string) (prefix, suffix string) {
	const longest = len("..-9223372036854775807-2147483647.part")
	job := safeName(k.jobID, "job")
	target := shorten(filepath.Base(final), maxPartialName-longest-len(job))
	suffix = ".part"
	if k.part != nil {
		suffix = fmt.Sprintf("-%d.part", *k.part)
	}
	return fmt.Sprintf(".%s.%s-", target, job), suffix
}

// openPartial opens the temporary file beside final, or makes it.
func openPartial(final string, key partialKey) (*partialFile, error) {
	prefix, suffix := key.name(final)
	path := filepath.Join(filepath.Dir(final), fmt.Sprintf("%s%d%s", prefix, key.generation, suffix))
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

// removeLeftovers removes temporary files of the same download to final that are of older
// generations: nothing can complete them. Where that fails they cost space, and no more.
func removeLeftovers(final string, key partialKey) {
	directory := filepath.Dir(final)
	entries, _ := os.ReadDir(directory)
	prefix, suffix := key.name(final)
	for _, entry := range entries {
		number, named := strings.CutPrefix(entry.Name(), prefix)
		number, ended := strings.CutSuffix(number, suffix)
		generation, err := strconv.ParseUint(number, 10, 63)
		if named && ended && err == nil && int64(generation) < key.generation {
			removeUnheld(filepath.Join(directory, entry.Name()))
		}
	}
}

// isEmpty tells whether there is nothing that the same call could go on from.
func (p *partialFile) isEmpty() bool {
	info, err := p.file.Stat()
	return err == nil && info.Size() == 0
}

func (p *partialFile) close() { _ = p.file.Close() } // what counts was synced

func (p *partialFile) remove() { _ = os.Remove(p.path) } // the download's error matters more

// publish gives the file its name, durably. The lock is held until close, so that nobody
// takes up the file while it is renamed.
func (p *partialFile) publish(final string, overwrite bool) error {
	if err := p.file.Sync(); err != nil {
		return err
	}
	if err := closeToRename(p.file); err != nil {
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
