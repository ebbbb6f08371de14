package exportd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxName is the longest name, in bytes, that a file gets from the server. File systems
// take 255.
const maxName = 180

// target is the file to write: path, or a name of the server's in it when it is a
// directory. One that ends with a separator is made when it is missing.
func target(path, fileName string) (string, error) {
	if path == "" {
		return "", errors.New("path: is empty; give a file or a directory")
	}
	if os.IsPathSeparator(path[len(path)-1]) {
		if err := os.MkdirAll(path, 0o777); err != nil {
			return "", err
		}
	}
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return filepath.Join(path, safeName(fileName, "export")), nil
	case err == nil || os.IsNotExist(err):
		return path, nil
	default:
		return "", err
	}
}

// safeName is a file name that stays in its directory, whatever the server said. Only the
// last component counts; control and format characters, which can hide or turn text
// around, and leading dots go; the length is bounded.
func safeName(name, fallback string) string {
	name = name[strings.LastIndexAny(name, `/\`)+1:]
	name = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.In(r, unicode.Cc, unicode.Cf) {
			return -1
		}
		return r
	}, name)
	name = strings.TrimLeft(strings.TrimSpace(name), ".")
	name = shorten(name, maxName)
	if !filepath.IsLocal(name) { // empty, or a device of Windows
		return fallback
	}
	return name
}

// shorten leaves the end of a name, which carries the extension, of at most so many bytes.
func shorten(name string, most int) string {
	for len(name) > most {
		_, size := utf8.DecodeRuneInString(name)
		name = name[size:]
	}
	return name
}
